"""The file of tokens: what is read, every refusal, and that no refusal repeats a token."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_recipes.config.errors import EXIT_SECRETS, SecretsError
from moe_recipes.launch.secrets import SECRET_NAMES, mask, read_secrets

TOKEN = "hf_Canary0123456789abcdef"
KEY = "0123456789abcdef0123456789abcdef01234567"


def write(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "secrets"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SecretsError) as caught:
        read_secrets(path)
    said = str(caught.value)
    assert caught.value.exit_code == EXIT_SECRETS == 77
    assert said.startswith(str(path))
    assert "\n" not in said
    assert TOKEN not in said
    assert caught.value.__cause__ is None or TOKEN not in str(caught.value.__cause__)
    return said


def test_names_and_values_are_read_with_comments_and_empty_lines(tmp_path: Path) -> None:
    text = f"# of the team\n\nHF_TOKEN={TOKEN}\n  WANDB_API_KEY={KEY}  \r\n"
    assert read_secrets(write(tmp_path, text)) == {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY}
    assert read_secrets(str(write(tmp_path, "", 0o400))) == {}
    assert read_secrets(write(tmp_path, f"HF_TOKEN={TOKEN}=="))["HF_TOKEN"] == f"{TOKEN}=="


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622, 0o644, 0o700, 0o610])
def test_a_file_that_others_may_touch_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, f"HF_TOKEN={TOKEN}\n", mode)
    assert f"has mode {mode:04o}" in refusal(path)
    assert f"chmod 600 {path}" in refusal(path)


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path = write(tmp_path, f"HF_TOKEN={TOKEN}\n")
    os.chown(path, 12345, -1)
    assert "belongs to user 12345" in refusal(path)


def test_missing_files_folders_and_pipes_are_refused_at_once(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "gone")
    assert "not a plain file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "not a plain file" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("\nHF_TOKEN=\n", 2, "HF_TOKEN has no value"),
        ("HF_TOKEN=abc\n", 1, "HF_TOKEN is shorter than 8"),
        (f"HF_TOKN={TOKEN}\n", 1, "unknown name HF_TOKN; did you mean 'HF_TOKEN'?"),
        (f"PATH={TOKEN}\n", 1, "unknown name PATH; known: HF_TOKEN, WANDB_API_KEY"),
        (f"HF_TOKEN={TOKEN}\nHF_TOKEN={TOKEN}\n", 2, "HF_TOKEN is there twice"),
        (f"{TOKEN}\n", 1, "not NAME=VALUE"),
        (f"{TOKEN}=1\n", 1, "not NAME=VALUE"),
        (f"export HF_TOKEN={TOKEN}\n", 1, "not NAME=VALUE"),
        (f"HF_TOKEN = {TOKEN}\n", 1, "not NAME=VALUE"),
        (f'HF_TOKEN="{TOKEN}"\n', 1, "the value of HF_TOKEN has a quote"),
        (f"HF_TOKEN={TOKEN} # mine\n", 1, "a space"),
        (f"HF_TOKEN={TOKEN}\x00\n", 1, "a control character"),
        (f"# x\nHF_TOKEN={TOKEN}\u00fc\n", 2, "not plain ASCII"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = write(tmp_path, text)
    said = refusal(path)
    assert said.startswith(f"{path}:{line}: ")
    assert message in said


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    assert "longer than 65536 bytes" in refusal(write(tmp_path, "#" * 70000))


def test_mask_replaces_every_value_the_longest_first() -> None:
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": f"{TOKEN}tail"}
    masked = mask(f"a {TOKEN} b {TOKEN}tail c", secrets)
    assert masked == "a <HF_TOKEN> b <WANDB_API_KEY> c"
    assert mask("plain", {}) == "plain"
    assert mask("plain", {"HF_TOKEN": ""}) == "plain"
    assert set(secrets) == set(SECRET_NAMES)
