"""Check that README.md is shown as meant, and that what it names exists. Print faults and sizes."""

import pydoc
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for ppo.py
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
MAX_CHARACTERS = 36_000
MAX_UNFOLDED = 17_000  # outside of <details>
MAX_COLUMNS = 96  # a longer command does not fit into GitHub's page
NUM_FORMULAS = 19

commands = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)).splitlines()
faults = [f"too long: {command}" for command in commands if len(command) > MAX_COLUMNS]

unfolded = re.sub(r"<details.*?</details>", "", README, flags=re.S)
if README.count("<details") != README.count("</details>"):
    faults.append("the numbers of <details> and </details> differ")

# Markdown changes a backslash before other characters than letters, as in \, and also }_.
# A | ends the cell of a table.
for formula in re.findall(r"\$[^$]+\$", re.sub(r"`[^`]*`", "", PROSE)):
    if re.search(r"\\[^A-Za-z]|\}_|\|", formula):
        faults.append(f"Markdown changes the formula {formula}")

# Links lead to a heading, as GitHub names it, or to a file.
headings = re.findall(r"^#+ (.+)$", PROSE, re.M)
anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
for link in re.findall(r'(?:\]\(|src="|href=")([^)"\s]+)', PROSE):
    path, _, anchor = link.partition("#")
    is_here = (ROOT / path).exists() if path else anchor in anchors
    if not (is_here or re.match(r"\w+:|\.\./\.\./", link)):
        faults.append(f"the link leads nowhere: {link}")

section = README.partition("\n## Formula map")[2].partition("\n## ")[0]
rows = re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", section, re.M)
if [int(number) for number, _ in rows] != list(range(1, NUM_FORMULAS + 1)):
    faults.append(f"the formula map has the rows {[number for number, _ in rows]}")
for number, place in rows:
    names = re.findall(r"`([\w.]+)`", place)
    missing = [name for name in names if not pydoc.locate(f"ppo.{name}")]
    if missing or not names:
        faults.append(f"row {number} of the formula map: ppo.py has no {missing or place}")

for name, text, limit in [
    ("README.md", README, MAX_CHARACTERS),
    ("outside of <details>", unfolded, MAX_UNFOLDED),
]:
    print(f"{name}: {len(text):,} of at most {limit:,} characters")
    if len(text) > limit:
        faults.append(f"{name}: too long")

for fault in faults:
    print("fault:", fault)
sys.exit(bool(faults))
