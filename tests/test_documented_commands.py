"""Every command that the documents show is one that the command line takes, with settings that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nas_gate import cli, commands
from nas_gate.cli import composed, settings_of

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "results").rglob("*.md"))]
HELPS = {
    f"{module.__name__}.{name}": text
    for module in (cli, commands)
    for name, text in vars(module).items()
    if name == "HELP" or name.endswith("_EXAMPLES")
}


def fenced(document: str) -> str:
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", document, flags=re.MULTILINE | re.DOTALL))


def shown(text: str) -> Iterator[list[str]]:
    """The words of every command in `text`, without what follows a comment's sign or stands aside in a help text."""
    for line in re.sub(r"\\\n\s*|\[key=value ...\]", " ", text).splitlines():
        if re.match(r"\s*(#|$)", line):
            continue
        try:
            words = shlex.split(re.split(r"\s{3,}", line.strip())[0], comments=True)
        except ValueError:  # one line of a program in quotes
            continue
        for start, word in enumerate(words):
            if word == "nas-gate":
                yield words[start:]
            elif word.startswith("benchmarks/"):
                yield ["python", *words[start:]]


COMMANDS = {
    (source.removeprefix(f"{ROOT}/"), " ".join(words)): words
    for source, text in [(str(path), fenced(path.read_text())) for path in DOCUMENTS] + list(HELPS.items())
    for words in shown(text)
}


def test_commands_are_found():
    sources = {source for source, _ in COMMANDS}
    assert {
        "README.md",
        "results/cifar10/README.md",
        "nas_gate.cli.HELP",
        "nas_gate.commands.EXPORT_EXAMPLES",
    } < sources
    assert len([words for words in COMMANDS.values() if words[1] == "search"]) > 30


def one_search(words: list[str]) -> list[str]:
    """Without options, what a study draws, `target=interval(0.1,0.8)`, or what plug-ins bring, `hydra/launcher=...`."""
    plain = [word for word in words if re.match(r"\+?[a-z_.]+=", word)]
    return [o.input_line or "" for o in OverridesParser.create().parse_overrides(plain) if not o.is_sweep_override()]


@pytest.mark.parametrize(("source", "command"), COMMANDS)
def test_a_documented_command_is_understood(source: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    program, name, *rest = COMMANDS[source, command]
    if program == "python" or name in ("search", "inspect"):
        settings_of(composed(one_search(rest)))
    else:  # a wrong option ends in SystemExit; here is nothing to do what is asked with
        assert cli.main([name, *rest]) == 2
    if program == "python":
        code = (ROOT / name).read_text()
        assert [word for word in rest if word.startswith("-") and f'"{word}"' not in code] == []
