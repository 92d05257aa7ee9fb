"""Score texts with fastText models, such as FineWeb-Edu's, DCLM's or your own (examples/quality/)."""

from __future__ import annotations

import re
from mmap import ACCESS_READ, mmap
from struct import error as StructError
from struct import unpack_from

from llmkit.errors import UserError
from llmkit.io.remote import cached_file, is_remote

_SPEC = re.compile(r"(?P<path>.+):(?P<label>[^:<>=]+)(?P<relation>>=|<)(?P<bound>[0-9.eE+-]+)")
PREFIX = "__label__"
MAGIC = b"\xba\x16\x4f\x2f"  # FASTTEXT_FILEFORMAT_MAGIC_INT32


class Classifier:
    """A model and the bound on its label's probability: `model.bin:__label__hq>=0.5`; the prefix is optional."""

    def __init__(self, spec: str) -> None:
        """Load the model. Raises UserError for a malformed spec, a file that is not a model, or an unknown label."""
        import fasttext

        match = _SPEC.fullmatch(spec)
        try:
            bound = float(match["bound"]) if match else -1.0
        except ValueError:
            bound = -1.0
        if match is None or not 0 <= bound <= 1:
            raise UserError(f"--classifier {spec}: expected MODEL.bin:LABEL>=SCORE or LABEL<SCORE, SCORE from 0 to 1")
        self.path, self._at_least, self._bound = match["path"], match["relation"] == ">=", bound
        self.label = PREFIX + match["label"].removeprefix(PREFIX)
        labels = labels_of(self.path)
        if self.label not in labels:
            known = ", ".join(sorted(label.removeprefix(PREFIX) for label in labels)[:20])
            raise UserError(f"--classifier {spec}: the model has no such label; it has {known}")
        self._model = fasttext.load_model(self.path)

    def score(self, text: str) -> float:
        """Return the probability of the label, 0 to 1."""
        labels, scores = self._model.predict(text.replace("\n", " "), -1)
        return min(float(scores[labels.index(self.label)]), 1.0) if self.label in labels else 0.0

    def keeps(self, score: float) -> bool:
        """Return True if a text with this score is kept."""
        return score >= self._bound if self._at_least else score < self._bound


def local_spec(spec: str) -> str:
    """Return the spec with a local path; a remote model is downloaded to --cache. Raises UserError."""
    path, colon, rest = spec.rpartition(":")
    return f"{cached_file(path)}:{rest}" if colon and is_remote(path) and "/" in path.partition("://")[2] else spec


def labels_of(path: str) -> set[str]:
    """Return the labels of a fastText model, and check that its file is complete: fasttext crashes on truncated files.

    The layout is that of FastText::saveModel, version 12. Raises UserError for other and for truncated files.
    """
    labels, is_model, is_complete = set(), False, False
    try:
        with open(path, "rb") as handle, mmap(handle.fileno(), 0, access=ACCESS_READ) as data:
            is_model = data[:4] == MAGIC
            position = 8 + 12 * 4 + 8  # magic and version, arguments
            words, _, _, _, pruned = unpack_from("<3i2q", data, position) if is_model else (0, 0, 0, 0, 0)
            position += 28
            for _ in range(words):
                end = data.find(b"\0", position)
                if end < 0:
                    raise ValueError("no end of a word")
                if data[end + 9] == 1:
                    labels.add(data[position:end].decode())
                position = end + 10
            position += 8 * max(pruned, 0)
            for _ in range(2):  # word and label matrix; if the former is quantized, the latter need not be
                is_quantized, position = data[position], position + 1
                if not is_quantized:
                    rows, columns = unpack_from("<2q", data, position)
                    position += 16 + 4 * rows * columns
                    continue
                has_norms, rows, _, codes = unpack_from("<?2qi", data, position)
                position += 21 + codes
                for extra in (0, rows)[: 1 + has_norms]:  # the rows' quantizer; then the norms and theirs
                    (dimensions,) = unpack_from("<i", data, position + extra)
                    position += extra + 16 + 4 * 256 * dimensions
            is_complete = position == len(data)
    except OSError as error:
        raise UserError(f"{path}: cannot read the classifier: {str(error.strerror).lower()}") from error
    except (ValueError, IndexError, StructError):  # an empty file, or a read past the end
        pass
    if not is_model:
        raise UserError(f"{path}: expected a fastText model (.bin or .ftz), found another file")
    if not is_complete:
        raise UserError(f"{path}: damaged or truncated fastText model; download it again")
    return labels
