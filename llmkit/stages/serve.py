"""`llmkit serve`: models behind an OpenAI-compatible API, and a chat page."""

from __future__ import annotations

import re
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import LARGEST_INTEGER, CommonConfig, DecodingConfig, ToolConfig, argument, option
from llmkit.errors import UserError
from llmkit.io.files import sole_writer
from llmkit.io.jsonl import open_input, read_text
from llmkit.io.progress import say
from llmkit.io.remote import is_remote
from llmkit.io.run_folder import check_model_folder

if TYPE_CHECKING:
    from llmkit.serving.collect import Judgements
    from llmkit.serving.models import ServedModel

ORIGIN = re.compile(r"\*|[A-Za-z][\w+.-]*://[^\s/?#@*]+/?")  # what a browser's header Origin can be
EXAMPLE = "llmkit serve chat/"
LOCAL = ("localhost", "127.0.0.1", "[::1]")  # names that a browser on this machine may use


@dataclass(frozen=True, kw_only=True)
class ServeConfig(DecodingConfig, ToolConfig, CommonConfig):
    """Options of `llmkit serve`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit serve chat/
          llmkit serve base/ chat/ --port 8080 --dtype int8
          llmkit serve policy/ --tools calc,python --collect judged.jsonl --guide guide.md
          llmkit serve chat/ --host 0.0.0.0 --api-key-file keys.txt

        The API is at http://127.0.0.1:8000/v1 and the chat page at http://127.0.0.1:8000 (docs/serve.md). A model is
        named after its folder. The same prompt and seed give the same text as llmkit sample, whatever the load
        (exactly in float32 and int8 on a CPU). SIGTERM and Ctrl-C let running requests finish.
    """
    following: ClassVar[str] = "llmkit sample --engine openai:http://127.0.0.1:8000/v1#chat -p 'Once upon a time'"

    models: tuple[str, ...] = argument("Model folders, from llmkit or Hugging Face.", metavar="MODEL...")
    host: str = option(
        "127.0.0.1", "Address to listen on; one that other machines can reach needs --api-key-file.", metavar="HOST"
    )
    port: int = option(8000, "Port; 0: any free port.", at_least=0, at_most=65535)
    api_key_file: str | None = option(None, "File of accepted API keys, one per line.", metavar="FILE", reads=True)
    allow_origin: tuple[str, ...] = option(
        (), "Origin allowed to send requests (CORS), such as https://app.example; repeatable.", metavar="ORIGIN"
    )
    collect: str | None = option(None, "Base name of the two JSONL files for people's judgements.", metavar="FILE")
    guide: str | None = option(None, "Markdown instructions for the people who judge.", metavar="FILE", reads=True)
    queue: int = option(256, "Maximum number of waiting requests per model; more get status 429.", at_least=0)
    timeout: float = option(600, "Timeout of a request.", unit="duration", above=0, free=True)
    seed: int = option(0, "Random seed for requests without one.", group="Common", at_least=0, at_most=LARGEST_INTEGER)
    out: None = None  # no --out, --limit and --force: there is no output
    limit: None = None
    force: None = None

    def reads_stdin(self) -> bool:
        """True if help is wanted: without a model there is nothing to do."""
        return not self.models


def run(config: ServeConfig) -> None:
    """Check, load, serve. Raises UserError for the user's mistakes."""
    from llmkit.tools.search import is_this_machine

    for package in ("pydantic", "starlette", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"serve: needs the package {package}; pip install 'llmkit[serve]'")
    for origin in config.allow_origin:
        if not ORIGIN.fullmatch(origin):
            raise UserError(f"--allow-origin {origin}: expected a scheme and a host, such as https://app.example, or *")
    names = _names(config)
    keys = _keys(config)
    if not keys and not is_this_machine(config.host.strip("[]")):
        raise UserError(
            f"--host {config.host}: other machines could use the model; an address that they can reach needs "
            "--api-key-file FILE"
        )
    guide = None
    if config.guide is not None:
        if config.collect is None:
            raise UserError("--guide: needs --collect FILE.jsonl, for the judgements")
        with open_input(config.guide) as handle:
            guide = read_text(handle, config.guide)
    with ExitStack() as stack:
        judgements = None
        if config.collect is not None:
            from llmkit.serving.collect import Judgements

            judgements = Judgements(config.collect)
            stack.enter_context(sole_writer(config.collect))
        models = _load(config, names, stack)
        if config.dry_run:
            for model in models:
                for line in model.generator.plan():
                    say(line, config.quiet)
            return
        _serve(config, models, keys, judgements, guide)


def _names(config: ServeConfig) -> dict[str, str]:
    """Return the folder of each model name. Raises UserError if two have the same name."""
    names: dict[str, str] = {}
    for path in config.models or (None,):
        check_model_folder(path, EXAMPLE)
    for path in config.models:
        name = path.rstrip("/").rpartition("/")[2] if is_remote(path) else Path(path).resolve().name
        if name in names:
            raise UserError(f"{path}: expected folders of different names, found two {name!r}; requests name them")
        names[name] = path
    return names


def _keys(config: ServeConfig) -> list[bytes]:
    if config.api_key_file is None:
        return []
    with open_input(config.api_key_file) as handle:
        keys = [line.strip() for line in read_text(handle, config.api_key_file).splitlines() if line.strip()]
    if not keys:
        raise UserError(f"{config.api_key_file}: expected a key on each line, found none")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UserError(f"{config.api_key_file}: expected keys of ASCII letters without spaces")
    return [key.encode() for key in keys]


def _load(config: ServeConfig, names: dict[str, str], stack: ExitStack) -> list[ServedModel]:
    from llmkit.generation.generator import Generator
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.sampler import open_sampler
    from llmkit.model.devices import use_huge_pages
    from llmkit.serving.models import ServedModel
    from llmkit.tokenizer.chat import has_chat_tokens, has_own_template
    from llmkit.tokenizer.encoding import load_tokenizer

    chats: set[str] = set()  # base models among them get no tools, instead of an error
    if len(names) > 1 and (config.tools or config.thinking != "auto"):
        tokenizers = {name: load_tokenizer(path) for name, path in names.items()}
        chats = {name for name, known in tokenizers.items() if has_chat_tokens(known) or has_own_template(known)}
    models = []
    for name, path in names.items():
        tools = None if chats and name not in chats else config
        opened = open_sampler(
            path, Sampling(), device=config.device, dtype=config.dtype, slots=config.batch_size, tools=tools
        )
        generator = stack.enter_context(opened)
        assert isinstance(generator, Generator)
        if not config.dry_run:
            with generator.computing():
                _ = generator.decoder  # loads the weights
        models.append(ServedModel(name, path, generator, config.seed))
    if not config.dry_run and any(model.generator.device.type == "cpu" for model in models):
        threading.Thread(target=use_huge_pages, daemon=True).start()
    return models


def _serve(
    config: ServeConfig,
    models: list[ServedModel],
    keys: list[bytes],
    judgements: Judgements | None,
    guide: str | None,
) -> None:
    from llmkit.serving import server
    from llmkit.serving.app import Service, build
    from llmkit.serving.engine import Engine

    host = config.host.strip("[]")
    sock = server.listen(host, config.port)

    def start(loop: Any) -> Any:
        engine = Engine({model.name: model.generator for model in models}, loop)
        service = Service(
            models,
            engine,
            slots=config.batch_size,
            queue=config.queue,
            timeout=config.timeout,
            judgements=judgements,
            guide=guide,
        )
        hosts = () if keys else {*LOCAL, config.host}  # with keys, a page of another site is refused anyway
        origins = [origin.lower().rstrip("/") for origin in config.allow_origin]
        app = build(service, keys=keys, hosts=hosts, origins=origins)
        address = f"[{host}]" if ":" in host else host
        say(f"serving {', '.join(model.name for model in models)} on http://{address}:{sock.getsockname()[1]}")
        return app, engine.close

    server.run(sock, start)
    for model in models:
        for line in model.generator.describe():
            say(f"{model.name}: {line}", config.quiet)
