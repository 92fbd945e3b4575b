"""The README's picture: runs the demo and draws what it prints, docs/demo.svg.

python docs/demo_picture.py
"""

from pathlib import Path

from twofold import demo, terminal

terminal.CONSOLE = demo.CONSOLE = terminal.Console(record=True, width=84, force_terminal=True)
demo.demo(Path("twofold-demo"))
picture = Path(__file__).with_name("demo.svg")
picture.write_text(terminal.CONSOLE.export_svg(title="twofold demo"))
