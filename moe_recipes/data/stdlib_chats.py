"""Demo data from the machine's own Python: ``python -m moe_recipes.data.stdlib_chats OUT_DIR``.

Writes ``OUT_DIR/train.jsonl``, question-and-answer chats about functions and classes of the standard library and the
installed packages, and ``OUT_DIR/tokenizer``, a small byte-level tokenizer trained on them, with a ChatML template.
Sources are parsed, never imported. The text stays on this machine: it is under its packages' licences.
The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import CannotWriteError, MissingInputError, MoeRecipesError

MAX_CHATS = 6000
VOCAB_SIZE = 2048
MAX_CHATS_PER_FILE = 16
MAX_CHATS_PER_PACKAGE = 200
MAX_FILE_BYTES = 400_000
MAX_SOURCE_BYTES = 24_000_000
"""What is parsed at most, about 4 MB/s; stops a machine with thousands of packages from taking minutes."""

MAX_SIGNATURE_CHARACTERS = 240
MAX_ANSWER_CHARACTERS = 900
MIN_ANSWER_CHARACTERS = 24
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def make_demo(out_dir: Path, *, max_chats: int = MAX_CHATS, vocab_size: int = VOCAB_SIZE) -> str:
    """Write the chats and the tokenizer; one line of counts.

    Raises:
        MissingInputError: this Python has no sources.
        CannotWriteError: ``out_dir`` cannot be written.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{out_dir}: {error.strerror}") from error
    chats = list(_chats(max_chats))
    if not chats:
        raise MissingInputError(f"no Python sources with docstrings in {sysconfig.get_path('stdlib')}")
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    tokenizer = train_tokenizer((message["content"] for chat in chats for message in chat), vocab_size=vocab_size)
    longest = max(len(ids) for ids in tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"])
    try:
        tokenizer.save_pretrained(str(out_dir / "tokenizer"))
        (out_dir / "train.jsonl").write_bytes(data)
    except OSError as error:
        raise CannotWriteError(f"{out_dir}: {error.strerror}") from error
    return (
        f"{out_dir / 'train.jsonl'}: {len(chats):,} chats, {len(data) / 1e6:.1f} MB, longest {longest:,} tokens;"
        f" {out_dir / 'tokenizer'}: {len(tokenizer):,} tokens"
    )


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with ChatML's special tokens and a template that marks assistant turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _chats(max_chats: int) -> Iterator[list[dict[str, str]]]:
    count = parsed_bytes = 0
    seen: set[str] = set()
    for paths in _packages():
        in_package = 0
        for name, path in paths:
            parsed_bytes += path.stat().st_size
            if count >= max_chats or parsed_bytes > MAX_SOURCE_BYTES:
                return
            for chat in _file_chats(name, path, seen):
                yield chat
                count += 1
                in_package += 1
                if count >= max_chats:
                    return
            if in_package >= MAX_CHATS_PER_PACKAGE:
                break


def _packages() -> Iterator[Iterator[tuple[str, Path]]]:
    """For each package its ``(module name, file)``: every top-level part of the standard library, then those of the
    installed packages, both by name."""
    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))
    for root in roots:
        for top in sorted(root.iterdir()) if root.is_dir() else []:
            if not top.name.startswith((".", "_")) and top.name not in SKIPPED_FOLDERS:
                if top.is_dir():
                    yield _package_files(root, sorted(top.rglob("*.py")))
                elif top.suffix == ".py":
                    yield _package_files(root, [top])


def _package_files(root: Path, paths: list[Path]) -> Iterator[tuple[str, Path]]:
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        hidden = any((part.startswith("_") and part != "__init__") or part in SKIPPED_FOLDERS for part in parts)
        if not hidden and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
            yield ".".join(part for part in parts if part != "__init__"), path


def _file_chats(module: str, path: Path, seen: set[str]) -> Iterator[list[dict[str, str]]]:
    """At most ``MAX_CHATS_PER_FILE`` chats; an answer that was given before is not given again."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return  # files for other Pythons, templates: no part of what is asked about
    count = 0
    for name, node, is_method in _definitions(module, tree.body):
        answer = _first_paragraphs(ast.get_docstring(node) or "")
        signature = _signature(name, node, is_method=is_method)
        if len(answer) < MIN_ANSWER_CHARACTERS or answer in seen or len(signature) > MAX_SIGNATURE_CHARACTERS:
            continue
        seen.add(answer)
        yield _chat(name, signature, answer, is_class=isinstance(node, ast.ClassDef))
        count += 1
        if count == MAX_CHATS_PER_FILE:
            return


def _definitions(prefix: str, body: list[ast.stmt]) -> Iterator[tuple[str, Definition, bool]]:
    """``(dotted name, node, is a method)`` of every public function, class and method."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield name, node, False
            if isinstance(node, ast.ClassDef):
                for method_name, method, _ in _definitions(name, node.body):
                    yield method_name, method, True


def _signature(name: str, node: Definition, *, is_method: bool) -> str:
    if isinstance(node, ast.ClassDef):
        inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not inits:
            return f"{name}()"
        node, is_method = inits[0], True
    arguments = ast.unparse(node.args)
    if is_method:
        arguments = arguments.removeprefix("self").removeprefix("cls").removeprefix(", ")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None and not name.endswith("__init__") else ""
    return f"{name}({arguments}){returns}"


def _first_paragraphs(docstring: str) -> str:
    """As many whole paragraphs as fit; nothing if the first does not."""
    kept = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        longer = f"{kept}\n\n{paragraph}".strip()
        if len(longer) > MAX_ANSWER_CHARACTERS:
            break
        kept = longer
    return kept.encode("utf-8", errors="ignore").decode("utf-8")  # half a surrogate pair, as an example of one


def _chat(name: str, signature: str, answer: str, *, is_class: bool) -> list[dict[str, str]]:
    """One of four forms, chosen by the name, so that a chat does not change when others come or go."""
    short = name.rpartition(".")[2]
    shown = f"{name}(...)" if not is_class else f"the class {name}"
    signature_turns = [f"What is the signature of {name}?", f"```python\n{signature}\n```"]
    form = zlib.crc32(name.encode()) % 4
    if form == 0:
        turns = [f"What does {signature} do?", answer]
    elif form == 1:
        turns = [f"In Python, what is {shown} for?", answer]
    elif form == 2:
        turns = [f"Explain {short} from {name.rpartition('.')[0]}.", answer, *signature_turns]
    else:
        turns = [*signature_turns, "And what does it do?", answer]
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code."""
    description = "Write question-and-answer chats from this Python's own docstrings, and a tokenizer for them."
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.data.stdlib_chats", description=description)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    try:
        print(make_demo(parser.parse_args(arguments).out_dir))
    except MoeRecipesError as error:
        print(f"moe-recipes: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
