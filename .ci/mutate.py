"""Change ppo.py in one place at a time, and see whether the tests notice.

    python .ci/mutate.py [--only gae] [--sample 20]

If a mutant survives, a line of the algorithm could be wrong and nobody would notice. Then a test is
missing, or the change makes no difference and EXPLAINED says why. A sample stays the same as long
as ppo.py does. The exit status is 1 if a survivor is not explained, if an explanation is of no
mutant, or if tests fail on ppo.py.
"""

import argparse
import ast
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
END = "\n# §11"  # the algorithm ends where a line starts like this
# Tests that are slow or about the program never run. The others run in their order, formulas first.
NEVER = "tasks_are_learned or readme or command or disk or render or importing"
SECONDS = 240  # tests that take longer are in an endless loop

# Why no test can notice a survivor. A key is the start of a mutant's name, with _ for every
# variable, which may so be renamed.
EXPLAINED = {
    "init_mlp: _, _, _=1.0, _=np.float32": "The gain is always given.",
    "init_mlp: _ >= _ -> _ > _": "A square Q and its transpose are alike.",
    "mlp_backward: _ is not _[0] -> True": "Nothing uses the gradient of the first layer's inputs.",
    "log_softmax: _ = np.asfortranarray(_)": "It is only faster.",
    "Gaussian: _.mean + _.std * _ -> _.mean - _.std * _": "The noise is symmetric.",
    "actor_loss: _ > 0 -> True": "A coefficient of 0 adds 0.",
    "clip_by_global_norm: _ > _ -> _ >= _": "If equal, the factor is 1.",
    "clip_by_global_norm: _ * math.nan": "nan in any case.",
    "Agent: [0, 1, 0.0001]": "It has almost no weight.",
    "learn: 2 ** 31": "Larger seeds are as good.",
    "learn: _.reshape((_ + 1) * _, -1) -> _.reshape((_ + 1) * _, -2)": "Any negative size will do.",
    "fisher_product: 2 * float(np.finfo(_.dtype).eps) ** (1 / 3) -> 3 *": "It is as exact.",
    "conjugate_gradients: _, _, _=10": "One more changes x little.",
    "conjugate_gradients: _ @ _ <= 1e-10 * (_ @ _) -> _ @ _ < 1e": "Never equal.",
    "trust_region_step: _ <= _ -> _ < _": "Never equal.",
    "trust_region_step: _ < _ -> _ <= _": "Never equal.",
    "observe: _.settings.normalize_steps == 0 -> False": "normalize uses nothing of it then.",
    "observe: return -> pass": "Likewise.",
    "observe: abs(_ - _.obs_mean) > 10 * _.obs_std -> abs(_ - _.obs_mean) >=": "Never equal.",
    "report: abs(_) > _.settings.clip -> abs(_) >=": "Never equal.",
}

# Operators (as ast names them) and functions that take each other's place.
PAIRS = "Add Sub, Mult Div, BitOr BitAnd, And Or, Lt LtE, Gt GtE, Eq NotEq, Is IsNot"
PAIRS += ", min max, minimum maximum, argmin argmax, zeros ones, zeros_like ones_like, any all"
PAIRS += ", logical_or logical_and, mean sum, ceil floor, var std"
SWAPS = {"FloorDiv": "Div", "Mod": "Mult", "Pow": "Mult", "MatMult": "Mult", "reversed": "list"}
for pair in PAIRS.split(", "):
    one, other = pair.split()
    SWAPS |= {one: other, other: one}


def replacements(node, parent, field, variables):
    """Yield what is written in place of a node, which is in this field of its parent."""
    kind = type(node).__name__
    value = getattr(node, "value", None)
    is_docstring = kind == "Expr" and isinstance(value, ast.Constant)
    is_result = kind == "Return" and value is not None
    if isinstance(node, ast.stmt) and not (hasattr(node, "body") or is_docstring or is_result):
        if all(variables.count(name) > 1 for name in variables_of(node)):
            yield ast.Pass()  # what it assigns gets another value elsewhere
    elif kind in SWAPS:
        # To change a number beside an operator, or to leave out a += statement, says as much.
        terms = [type(child) for child in ast.iter_child_nodes(parent)]
        if ast.Constant not in terms and not isinstance(parent, ast.AugAssign):
            yield getattr(ast, SWAPS[kind])()
    elif kind == "UnaryOp" and not isinstance(node.operand, ast.Constant):
        yield node.operand
    elif type(value) in (int, float) and not 0 < value < 1e-6:  # which protects a division
        yield ast.Constant(value + 1 if type(value) is int or value == 0 else 2 * value)
    elif field == "func":
        start, dot, name = ast.unparse(node).rpartition(".")
        if name in SWAPS:
            yield ast.Name(start + dot + SWAPS[name])
    if field == "test":
        if not isinstance(parent, ast.While):  # it would never end
            yield ast.Constant(True)
        yield ast.Constant(False)


def variables_of(node):
    """Return the name of a variable for each time that it gets a value in a node."""
    parts = list(ast.walk(node))
    names = [p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)]
    return names + [part.arg for part in parts if isinstance(part, ast.arg)]


def changes(parent, shown, variables):
    """Make each change in a node, yield the text before and after, and undo it."""
    for field, value in ast.iter_fields(parent):
        holder = value if isinstance(value, list) else vars(parent)
        for key in range(len(value)) if isinstance(value, list) else [field]:
            node = holder[key]
            if isinstance(node, ast.AST) and not isinstance(node, ast.Raise):
                says_enough = isinstance(node, ast.stmt) or field == "test"
                before = ast.unparse(node if says_enough else shown)
                for new in replacements(node, parent, field, variables):
                    holder[key] = new
                    yield f"{before} -> {ast.unparse(new if says_enough else shown)}"
                holder[key] = node
                shown_next = shown if isinstance(node, (ast.UnaryOp, ast.Slice)) else node
                yield from changes(node, shown_next, variables)


def find_mutants(source):
    """Return the mutants as (name, key, source), and the source itself, written like them.

    A syntax tree has no comments. So only the function or class that is changed is written from it.
    """
    mutants = []
    unchanged = source
    for definition in ast.parse(source[: source.index(END)]).body:
        name = getattr(definition, "name", "Settings")
        if name == "Settings":  # defaults and help texts, or a statement without a name
            continue
        text = ast.get_source_segment(source, definition)
        unchanged = unchanged.replace(text, ast.unparse(definition))
        variables = variables_of(definition)
        pattern = rf"(?<![\w.])({'|'.join(variables) or '_'})\b"
        for change in changes(definition, definition, variables):
            key = f"{name}: {re.sub(pattern, '_', change)}"
            mutated = source.replace(text, ast.unparse(definition))
            mutants.append((f"{name}: {change}", key, mutated))
    return mutants, unchanged


def tests_pass(source):
    """Run the tests on this ppo.py in a folder of its own. Tests that take too long do not pass."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files = ["test_ppo.py", "README.md", "LICENSE", ".ci"]  # what the tests may read
        subprocess.run(["cp", "-r", *files, folder], cwd=ROOT, check=True)
        Path(folder, "ppo.py").write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-xq", "-k", f"not ({NEVER})"]
        command += ["-p", "no:cacheprovider", "--basetemp=temporary", "test_ppo.py"]
        try:
            tests = subprocess.run(command, cwd=folder, capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return tests.returncode == 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--sample", type=int, default=10**6)
    options = parser.parse_args()

    mutants, unchanged = find_mutants((ROOT / "ppo.py").read_text(encoding="utf-8"))
    keys = [key for _, key, _ in mutants]
    faults = [start for start in EXPLAINED if not any(key.startswith(start) for key in keys)]
    for start in faults:
        print("explained, but no mutant:", start)
    mutants = [mutant for mutant in mutants if options.only in mutant[0]]
    if options.sample < len(mutants):
        mutants = random.Random(0).sample(mutants, options.sample)
    if not tests_pass(unchanged):
        print("the tests fail on ppo.py itself")
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(tests_pass, [source for _, _, source in mutants])
        for (name, key, _), survives in zip(mutants, results, strict=True):
            if survives:
                reasons = [EXPLAINED[start] for start in EXPLAINED if key.startswith(start)]
                print(f"survived: {name}\n    {key}: {reasons or 'NOT EXPLAINED'}", flush=True)
                if not reasons:
                    faults.append(key)
    print(f"{len(mutants)} mutants, {len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
