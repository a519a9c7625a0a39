"""Every code block of the README, of docs/ and of CONTRIBUTING.md runs as it stands.

A page's blocks run one after another in one folder, each Python block with names of its own: what a reader does who
follows the page. The comment behind a `print(...)` is what it prints. A block that cannot run here says so and why:
`<!-- not run by the tests: it downloads weights -->`, in the line before it.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.run import parse_args
from typer.testing import CliRunner

from bn_insert.checkpoints.save import save_checkpoint
from bn_insert.demo import images_path
from bn_insert.images import Transform
from bn_insert_cli.app import app
from support.commands import forked_ranks
from support.digits import copy_digits, copy_labelled_digits
from support.vgg_specs import vgg_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = r"^ *<!-- not run by the tests: \S[^\n]* -->\n"
FENCED = r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$"
BLOCK = re.compile(f"(?P<excuse>{NOT_RUN})?{FENCED}", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^ *print\(.*\)\n((?:# .*(?:\n|\Z))+)", re.MULTILINE)
# The commands of these are read out of the README and run by .ci/run.
SET_UP = re.compile(r"<!-- set-up -->.*?<!-- end of set-up -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    excused: bool

    @property
    def runs(self) -> bool:
        return self.language in RUNNERS and not self.excused

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = SET_UP.sub(lambda found: "\n" * found.group().count("\n"), page.read_text(encoding="utf-8"))
    return [
        Block(
            page,
            text.count("\n", 0, found.start("indent")) + 1,
            found["language"].strip(),
            textwrap.dedent(found["code"]),
            excused=found["excuse"] is not None,
        )
        for found in BLOCK.finditer(text)
    ]


def name_of(page: Path) -> str:
    return page.stem


BLOCKS = {page: blocks_of(page) for page in PAGES}


def run_python(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    padding = "\n" * block.line  # so that a traceback names the line of the page
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(padding + block.code, str(block.page), "exec"), names)
    assert "plain" not in names or not names["plain"].training, f"{block}: folded to be deployed, but in train mode"
    printed = capsys.readouterr().out
    for shown in SHOWN.findall(block.code):
        expected = "\n".join(line.removeprefix("# ") for line in shown.splitlines())
        assert expected in printed, f"{block} shows\n{expected}\nand printed\n{printed}"


def run_shell(block: Block, _capsys: pytest.CaptureFixture[str]) -> None:
    for command in block.code.replace("\\\n", " ").splitlines():
        if command.startswith("bn-insert "):  # in this process: starting one for each would take most of the time
            result = CliRunner().invoke(app, shlex.split(command)[1:])
            assert result.exit_code == 0, f"{block}\n{command}\n{result.output}\n{result.exception!r}"
        elif command.startswith("torchrun "):  # in forked processes: torchrun's own would import torch anew
            given = parse_args(shlex.split(command)[1:])
            assert given.module
            program = ("-m", given.training_script, *given.training_script_args)
            ranks = forked_ranks(int(given.nproc_per_node), *program, folder=Path.cwd())
            assert ranks.returncode == 0, f"{block}\n{command}\n{ranks.stdout}\n{ranks.stderr}"
        else:
            ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False)
            assert ran.returncode == 0, f"{block}\n{command}\n{ran.stdout}\n{ran.stderr}"


RUNNERS: dict[str, Callable[[Block, pytest.CaptureFixture[str]], None]] = {
    "python": run_python,
    "sh": run_shell,
}


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a folder with what the pages call a reader's own: a checkpoint, photographs, labeled images."""
    # Small images: the commands read their size from the checkpoint.
    transform = Transform(resize=64, crop=64).to_dict()
    save_checkpoint(vgg_of(), tmp_path / "vgg16.pth", transform=transform)
    (tmp_path / "photographs").mkdir()
    for image in sorted((images_path() / "3").iterdir())[:12]:
        (tmp_path / "photographs" / image.name).symlink_to(image)
    copy_labelled_digits(tmp_path / "flowers", train=2, val=1, classes=4)
    # A few of the demo's images are enough for commands that train on them.
    copy_digits(tmp_path / "demo-images", 5)
    monkeypatch.setattr("bn_insert.demo.images_path", lambda: tmp_path / "demo-images")
    monkeypatch.chdir(tmp_path)
    # Where shell completion is installed, and for which shell: not those of whoever runs the tests.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))


@pytest.mark.usefixtures("_folder", "no_charts")
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in BLOCKS[page])], ids=name_of)
def test_the_code_blocks_of_a_page_run_in_their_order(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in BLOCKS[page]:
        if block.runs:
            RUNNERS[block.language](block, capsys)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_code_block_runs_or_is_output_or_says_why_it_cannot_run(page: Path) -> None:
    for block in BLOCKS[page]:
        assert block.language in {*RUNNERS, "text"}, f"{block}: {block.language!r} is neither python, sh nor text"
        assert "not run by" not in block.code, f"{block}: readers see that it is not run"
    excuses = re.findall("^ *<!-- not run by", page.read_text(encoding="utf-8"), re.MULTILINE)
    used = sum(block.excused for block in BLOCKS[page])
    assert len(excuses) == used, f"{page}: a comment is not directly before a block, or gives no reason"


def test_scripts_that_train_a_network_with_inserted_batchnorm_switch_off_the_dropout_before_it() -> None:
    trained = ("torch.optim", "Trainer", "fit_output(")
    blocks = [block for page in PAGES for block in BLOCKS[page] if any(word in block.code for word in trained)]
    scripts = [block for block in blocks if "insert_batchnorm(" in block.code]
    assert len(scripts) > 4
    assert [str(block) for block in scripts if "dropout_before_batchnorm=False" not in block.code] == []


def test_the_loop_that_switches_off_all_dropout_layers_reaches_those_of_every_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    network = nn.Sequential(*(kind(0.25) for kind in kinds))
    monkeypatch.setattr("bn_insert.load_checkpoint", lambda _: network)
    (block,) = [block for block in BLOCKS[ROOT / "docs" / "fine-tuning.md"] if "module.p = 0" in block.code]
    run_python(block, capsys)
    assert [module.p for module in network] == [0] * len(kinds)


def test_pages_have_blocks_that_run() -> None:
    assert any(block.runs for block in BLOCKS[ROOT / "README.md"])
    assert sum(block.runs for blocks in BLOCKS.values() for block in blocks) >= 15


# The documentation's own links are checked when the site is built.
@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_the_files_that_a_page_outside_of_docs_links_to_are_there(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_a_page_that_is_filled_when_the_site_is_built_says_so_in_the_repository_alone() -> None:
    hook = runpy.run_path(str(ROOT / "docs" / "repository_notes.py"))
    filled = [page for page in PAGES if re.search("^(--8<--|:::|<!-- commands)", page.read_text(), re.MULTILINE)]
    assert len(filled) >= 9
    for page in filled:
        text = page.read_text(encoding="utf-8")
        (note,) = hook["NOTE"].findall(text)
        links = re.findall(r"\]\(([^)#]+)", note)
        assert "mkdocs serve" in note or links
        assert [link for link in links if not (page.parent / link).exists()] == []
        built = hook["on_page_markdown"](text)
        assert len(built) == len(text) - len(note)
        assert "in the repository -->" not in built


@pytest.mark.parametrize("name", ["README.md", "docs/fine-tuning.md"])
def test_accuracies_that_are_quoted_are_among_those_that_the_benchmarks_wrote(name: str) -> None:
    results = (
        "finetuning/results/finetuning.md",
        "finetuning/results/command-line.md",
        *(f"renorm/results/{name}.md" for name in ("small-batches", "limit-rules")),
    )
    measured = "\n".join((ROOT / "benchmarks" / result).read_text(encoding="utf-8") for result in results)
    quoted = re.findall(r"\b0\.\d{3}\b\*?", (ROOT / name).read_text(encoding="utf-8"))
    assert quoted
    assert {figure for figure in quoted if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d*])", measured)} == set()


def test_the_readme_counts_the_networks_in_the_table_that_the_benchmark_wrote() -> None:
    written = (ROOT / "benchmarks/architectures/results/architectures.md").read_text(encoding="utf-8")
    networks = [line for line in written.splitlines() if line.startswith("|")][2:]
    counted = f"[{len(networks)} networks are tested](benchmarks/architectures/results/architectures.md)"
    assert counted in (ROOT / "README.md").read_text(encoding="utf-8")
