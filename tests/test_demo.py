"""The demo and the README, run as a newcomer runs them: in a folder and with a cache of their own."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """Runs a command in a newcomer's folder."""
    home = tmp_path_factory.mktemp("newcomer")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "TWOFOLD_CACHE": str(home / "cache"), "PATH": path}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="module")
def figures(newcomer):
    return json.loads(newcomer("twofold", "demo", "--json"))


@pytest.mark.timeout(1500)
def test_the_demo_learns_what_its_heads_did_not_know(figures):
    assert figures["data"]["items"] == 4495
    assert figures["training"]["loss"] < figures["training"]["chance"] / 2
    for direction in ("text_to_image", "image_to_text"):
        trained, untrained = (figures["recall"][name][direction] for name in ("trained", "untrained"))
        assert trained["recall"]["10"]["low"] > 0.4
        assert trained["recall"]["1"]["low"] > 0.1
        assert untrained["recall"]["10"]["value"] < 0.1
        assert trained["chance"] == untrained["chance"]


def test_the_demo_finds_what_is_asked_for(figures):
    found = [{hit["emoji"] for hit in search["hits"]} for search in figures["searches"]]
    sweet, heart, rain, _, green = found
    assert sweet & set("🧁🍰🍫🍬🍭🍩🍪🎂🍮🍯🍨🍦🥧🍧")
    assert heart & set("❤♥🩷🧡💕💖💗💓💞💝💘")
    assert {hit[0] for hit in rain} & set("☔🌧⛈☂")
    assert "🍏" in green


def test_the_demo_again_embeds_and_trains_nothing(figures, newcomer):
    again = json.loads(newcomer("twofold", "demo", "--json"))
    assert again["index"]["embedded"] == 0
    assert {**again, "seconds": 0, "index": 0} == {**figures, "seconds": 0, "index": 0}


def test_the_commands_of_the_readme_run(figures, newcomer):
    commands = re.findall(r"^twofold .+?(?=  +#|$)", "\n".join(re.findall(r"```sh\n(.+?)```", README, re.S)), re.M)
    assert len(commands) >= 6
    for command in commands:
        if command != "twofold demo":
            newcomer(*shlex.split(command))


def test_the_python_of_the_readme_prints_what_the_readme_shows(figures, newcomer):
    code, shown = re.search(r"```python\n(.+?)```\n+```text\n(.+?)```", README, re.S).groups()
    printed = newcomer(sys.executable, "-c", code)
    assert len(code.splitlines()) <= 12
    numbers = re.compile(r"-?\d+\.\d+")
    assert numbers.sub("#", printed).splitlines()[0] == numbers.sub("#", shown).splitlines()[0]
    # On another processor features differ in their last digits, and neighbours may change places.
    emoji = [set(re.findall(r"[^\x00-\u2fff]", text)) for text in (printed, shown)]
    assert len(emoji[0] & emoji[1]) >= len(emoji[1]) - 1


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(example, newcomer):
    newcomer(sys.executable, str(example))
