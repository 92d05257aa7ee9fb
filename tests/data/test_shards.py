"""Token shards: round trips, other tools read them, and incomplete ones raise an error that names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llmkit.data.shards import ShardInfo, ShardWriter, TokenShards
from llmkit.errors import UserError

SHA = "ab" * 32


def write(folder: Path, documents: list[list[int]], vocab_size: int = 1000, sha: str = SHA, **options) -> TokenShards:
    folder.mkdir(exist_ok=True)
    info = ShardInfo(tokenizer_sha256=sha, vocab_size=vocab_size, start=7, end=9)
    writer = ShardWriter(folder, info, **options)
    for k in range(0, len(documents), 3):
        some = documents[k : k + 3]
        ids = np.array([i for document in some for i in document], np.uint32)
        lengths = np.array([len(document) for document in some])
        writer.add(ids, lengths, lengths * 4)
    writer.finish()
    return TokenShards(folder)


@given(
    documents=st.lists(st.lists(st.integers(10, 99_999), min_size=1, max_size=20), min_size=1, max_size=20),
    tokens_per_shard=st.integers(1, 60),
)
def test_documents_come_back_in_order_however_they_fall_into_shards(tmp_path_factory, documents, tokens_per_shard):
    folder = tmp_path_factory.mktemp("shards")
    shards = write(folder, documents, vocab_size=100_000, tokens_per_shard=tokens_per_shard)
    assert [list(shards[k]) for k in range(len(shards))] == [[7, *document] for document in documents]
    assert shards.tokens == sum(map(len, documents)) + len(documents)
    assert shards.bytes == 4 * sum(map(len, documents))
    assert all(len(shard.tokens) - shard.doc_ends[-1] == 0 for shard in shards._shards)
    sizes = [len(shard.tokens) for shard in shards._shards]
    assert all(size >= tokens_per_shard for size in sizes[:-1])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_a_shard_is_an_aligned_safetensors_file_with_the_smallest_type(tmp_path, vocab_size, dtype):
    highest = vocab_size - 1
    shards = write(tmp_path / "s", [[highest, 3], [5, 6, highest]], vocab_size=vocab_size)
    arrays = load_file(tmp_path / "s" / "shard-00000.safetensors")
    assert arrays["tokens"].dtype == dtype
    assert arrays["tokens"].tolist() == [7, highest, 3, 7, 5, 6, highest]
    assert arrays["doc_ends"].tolist() == [3, 7]
    assert arrays["doc_bytes"].tolist() == [8, 12]
    assert shards._shards[0].metadata["tokenizer_sha256"] == SHA
    assert shards._shards[0].doc_ends.flags.aligned


def test_tokens_are_mapped_not_copied(tmp_path):
    shards = write(tmp_path / "s", [[1, 2, 3]])
    view = shards[0]
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    write(tmp_path / "s", [[1, 2, 3]] * 50)
    path = tmp_path / "s" / "shard-00000.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"shard-00000\.safetensors: truncated"):
            TokenShards(tmp_path / "s")


def test_foreign_files_are_refused_by_name(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(4)}, tmp_path / "shard-00000.safetensors")
    with pytest.raises(UserError, match=r"expected a token shard of format llmkit-tokens-1, found \['weight'\]"):
        TokenShards(tmp_path)
    (tmp_path / "shard-00000.safetensors").write_bytes((30).to_bytes(8, "little") + b"not JSON" * 20)
    with pytest.raises(UserError, match="no safetensors header"):
        TokenShards(tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder with shard-00000"):
        TokenShards(tmp_path)
    with pytest.raises(UserError, match="expected a folder with shard-00000"):
        TokenShards(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", [0, 1, -1])
def test_a_missing_shard_is_named(tmp_path, missing):
    shards = write(tmp_path / "s", [[1, 2, 3]] * 20, tokens_per_shard=10)
    path = shards._shards[missing].path
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: missing"):
        TokenShards(tmp_path / "s")


def test_shards_of_two_tokenizers_are_refused(tmp_path):
    write(tmp_path / "a", [[1, 2, 3]] * 20, tokens_per_shard=10)
    write(tmp_path / "b", [[1, 2, 3]] * 20, tokens_per_shard=10, sha="cd" * 32)
    (tmp_path / "b" / "shard-00001.safetensors").rename(tmp_path / "a" / "shard-00001.safetensors")
    with pytest.raises(UserError, match=r"shard-00001.*made with another tokenizer"):
        TokenShards(tmp_path / "a")
