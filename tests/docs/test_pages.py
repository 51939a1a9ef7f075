"""Everything in README and docs that a reader may type, click or look for is there."""

import doctest
import re
import shlex
from pathlib import Path

import pytest
from docs.pages import PAGES, ROOT, anchors, blocks, name, without_code

import quietstar
from quietstar.cli import COMMANDS, main

if not (ROOT / "docs").is_dir():
    pytest.skip("tests beside no docs", allow_module_level=True)

each_page = pytest.mark.parametrize("page", PAGES, ids=name)
UNKNOWN = "--no-such-flag"


@each_page
def test_examples_of_a_prompt(page):
    failed, _ = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert failed == 0


@each_page
def test_flags_exist(page, capsys):
    for command in (command for block in blocks(page) for command in block.commands):
        starter, _, rest = command.replace("$(which quietstar)", "quietstar").partition("quietstar ")
        if not rest or (starter and starter.split()[0] not in ("accelerate", "srun", "torchrun")):
            continue
        program, *arguments = shlex.split(rest, comments=True)
        assert program in COMMANDS, command
        with pytest.raises(SystemExit, match=r"^2$"):
            main([program, *arguments, UNKNOWN])
        assert re.search(rf"(unrecognized|unknown) arguments: {UNKNOWN}$", capsys.readouterr().err.strip()), command


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|srcset=\"([^\"]+)\"|src=\"([^\"]+)\"", without_code(page)):
        path, _, anchor = "".join(target).partition("#")
        if "://" in path:
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked) or anchor.startswith("quietstar."), target


@each_page
def test_files_that_are_named_exist(page):
    for word in re.findall(r"`([\w./*-]+)`", without_code(page)):
        if re.match(r"(benchmarks|csrc|docs|examples|quietstar|runs|tests)/.*\.(py|md|sh|json|yaml|cpp|cu|h)$", word):
            assert list(ROOT.glob(word)) or word in ("quietstar/report.html",), word


def test_every_page_is_in_the_contents_of_the_site():
    contents = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    made = {f"notebooks/{path.stem}.md" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert contents == written | made


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_answered_messages_are_still_given():
    package = Path(quietstar.__file__).parent
    source = "\n".join(path.read_text("utf-8") for path in package.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings of several lines
    messages = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "faq.md").read_text("utf-8"), re.MULTILINE)
    assert len(messages) > 20
    assert [message for message in messages if message not in source] == []


def test_every_command_has_an_example():
    commands = [command.split() for page in PAGES for block in blocks(page) for command in block.commands]
    shown = {words[1] for words in commands if words and words[0] == "quietstar"}
    assert shown == set(COMMANDS)
