"""Change the algorithm in ppo.py one place at a time, and see whether the tests notice.

    python .ci/mutate.py                  every mutant
    python .ci/mutate.py --sample 20      20 of them, the same ones as long as ppo.py stays the same
    python .ci/mutate.py --only gae       those with this text in their name
    python .ci/mutate.py --list           only print the names

A mutant is ppo.py with one change: another operator, another number, a statement left out. If all
tests pass, the mutant survives, and a line of the algorithm could be wrong without anybody
noticing. Then a test is missing, or the change makes no difference and EXPLAINED says why. The exit
status is 1 if a survivor is not explained or if the tests fail on ppo.py itself.

A mutant that is noticed takes a few seconds, mostly to start pytest, and one that survives takes as
long as the tests. All of them take about an hour on two processors.
"""

import argparse
import ast
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ["test_ppo.py", "README.md", "LICENSE", ".ci"]  # what the tests read beside ppo.py
END = "# §10"  # the algorithm ends where a line starts like this
NO_ALGORITHM = ["Settings"]  # a class of defaults and help texts

# Which tests run, as pytest's -k. Tests of formulas come first, because they notice most mutants.
FAST = "eq or gradient"
# These never run. They are slow, or about the program, and others notice more of the algorithm.
NEVER = "tasks_are_learned or mutant or readme or command or pipe or disk or render or importing"
SELECTIONS = [f"({FAST}) and not ({NEVER})", f"not ({FAST}) and not ({NEVER})"]

# Why no test can notice a survivor. The key is "function: before -> after", as in its name.
EXPLAINED: dict[str, str] = {
    "init_mlp: out_gain=1.0 -> out_gain=2.0": "ppo.py always gives the gain.",
    "init_mlp: fan_in >= fan_out -> fan_in > fan_out": "A square Q and its transpose are alike.",
    "mlp_backward: layer > 0 -> True": "Nothing uses the gradient of the first layer's inputs.",
    "mlp_backward: layer > 0 -> layer >= 0": "Nothing uses it here, either.",
    "log_softmax: logits = np.asfortranarray(logits) -> pass": "It is only faster.",
    "clip_by_global_norm: norm > max_norm -> norm >= max_norm": "If equal, the factor is 1.",
    "actor_loss: ent_coef > 0 -> True": "A coefficient of 0 adds 0.",
    "actor_loss: ent_coef > 0 -> ent_coef >= 0": "A coefficient of 0 adds 0.",
    "update: abs(ratio - 1) > settings.clip -> abs(ratio - 1) >= settings.clip": "Never equal.",
    "update: advantages.std() + 1e-8 -> advantages.std() + 0": "It only saves a division by 0.",
    "update: returns.var() + 1e-8 -> returns.var() + 0": "It only saves a division by 0.",
    "learn: agent.return_stats.var + 1e-8 -> agent.return_stats.var + 0": "Likewise.",
    "learn: inputs.reshape((T + 1) * N, -1) -> inputs.reshape((T + 1) * N, -2)": (
        "numpy infers any negative size."
    ),
    "Agent.observe: return -> pass": "normalize does not use them then. It saves time.",
    "Agent.observe: abs(obs - self.obs_mean) > 10 * self.obs_std -> "
    "abs(obs - self.obs_mean) >= 10 * self.obs_std": "Never equal.",
    "Diary.add: has_ending[t] -> True": "It is only faster.",
    "Diary.mean_return: float(np.mean(self.last_returns)) if self.last_returns else math.nan -> "
    "float(np.mean(self.last_returns)) if True else math.nan": (
        "The mean of nothing is nan, too, with a warning."
    ),
    "learn: 2**31 - N -> 2**31 + N": "Then one seed in 100 million is too large.",
    "fisher_product: 2 * machine_epsilon ** (1 / 3) -> 3 * machine_epsilon ** (1 / 3)": (
        "A little more is as exact."
    ),
    "conjugate_gradients: iterations=10 -> iterations=11": "One more changes x little.",
    "conjugate_gradients: residual @ residual < 1e-10 * (g @ g) -> "
    "residual @ residual <= 1e-10 * (g @ g)": "Never equal.",
    "trust_region_step: kl_new <= delta -> kl_new < delta": "Never equal.",
    "trust_region_step: loss_new < loss_old -> loss_new <= loss_old": "Never equal.",
    "Gaussian.sample: self.mean + self.std * noise -> self.mean - self.std * noise": (
        "The noise is symmetric."
    ),
}

# What is written in place of what.
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "**": "*", "|": "&", "&": "|"}
LOGIC = {"and": "or", "or": "and", "is": "is not", "is not": "is", "in": "not in", "not in": "in"}
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OPERATORS = ARITHMETIC | LOGIC | COMPARISONS
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
ARRAYS = {"zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "ones_like": "zeros_like"}
BOOLEANS = {"any": "all", "all": "any", "logical_or": "logical_and", "logical_and": "logical_or"}
OTHERS = {"argmax": "argmin", "ceil": "floor", "mean": "sum", "reversed": "list"}
FUNCTIONS = EXTREMES | ARRAYS | BOOLEANS | OTHERS
UNARY = {ast.USub: "-", ast.Not: "not ", ast.Invert: "~"}
TINY = 1e-6  # a number below this one protects a division, and becomes 0

COMPOUND = (ast.FunctionDef, ast.If, ast.While, ast.For, ast.With, ast.Try)
FRAGMENT = (ast.Constant, ast.Name, ast.Attribute, ast.Tuple, ast.List, ast.Slice)
FRAGMENT += (ast.Starred, ast.keyword, ast.arg)
NO_CODE = ["annotation", "returns", "decorator_list"]
UNTOUCHED = (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)


@dataclass
class Mutant:
    """The source of ppo.py with one change. The key is its name without the numbers of lines."""

    name: str
    key: str
    source: bytes


class Finder:
    """Collects the mutants of a source. Each expression and each statement, apart from those in it,
    is a place where one thing is changed. A condition is also replaced by True and by False."""

    def __init__(self, source):
        self.text = source.encode()  # ast counts columns in bytes
        self.line_starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))
        self.mutants = {}  # by key

    def search(self, function, name):
        """Collect the mutants of one function."""
        self.first_line = function.lineno
        self.name = name
        self.assigned = set()  # names that have a value, as far as the function was read
        self.changed = set()  # places that have their mutant
        self.visit(function, None)

    def visit(self, node, place):
        """Collect the mutants of a node and of all that is in it. place is the start and the end of
        the smallest expression or statement around the node that says something by itself."""
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_axis = isinstance(node, ast.keyword) and node.arg == "axis"
        if is_docstring or is_axis or isinstance(node, UNTOUCHED):
            return
        if isinstance(node, COMPOUND):
            place = None
        elif hasattr(node, "lineno") and (place is None or not self.is_fragment(node)):
            place = self.span(node)
        self.change(node, place)
        for field, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for child in children:
                if isinstance(node, ast.Subscript) and isinstance(child, ast.Constant):
                    continue  # another index fails at once, and so does another axis
                if isinstance(node, ast.arguments) and child in node.defaults:
                    parameters = node.posonlyargs + node.args
                    parameter = parameters[node.defaults.index(child) - len(node.defaults)]
                    self.visit(child, (self.span(parameter)[0], self.span(child)[1]))
                elif isinstance(child, ast.AST) and field not in NO_CODE:
                    self.visit(child, place)
        if isinstance(node, ast.arg):
            self.assigned.add(node.arg)
        if isinstance(getattr(node, "ctx", None), ast.Store):
            self.assigned.add(ast.unparse(node))

    def is_fragment(self, node):
        """Whether a node says little without the expression around it, as a number does."""
        is_number = isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)
        return is_number or isinstance(node, FRAGMENT)

    def span(self, node):
        """Where the text of a node starts and ends."""
        start = self.line_starts[node.lineno - 1] + node.col_offset
        end = self.line_starts[node.end_lineno - 1] + node.end_col_offset
        return start, end

    def can_be_left_out(self, node):
        """Whether every name that a statement gives a value has another one without it."""
        if not isinstance(node, ast.Assign):
            is_return = isinstance(node, ast.Return) and node.value is None
            return is_return or isinstance(node, (ast.Expr, ast.AugAssign, ast.Break, ast.Continue))
        if isinstance(node.value, ast.BinOp):
            return False  # its operator or its number is changed
        for target in node.targets:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                is_new = isinstance(part, ast.Name) or self.name.endswith("__init__")
                if is_new and ast.unparse(part) not in self.assigned:
                    return False
        return True

    def change(self, node, place):
        """Make the mutants of this node alone."""
        if isinstance(node, ast.stmt) and self.can_be_left_out(node):
            self.change_once(self.span(node), "pass", place)
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            self.change_condition(node, place)
        elif isinstance(node, ast.BinOp):
            self.change_arithmetic(node, place)
        elif isinstance(node, ast.BoolOp):
            self.change_operators(node.values, place)
        elif isinstance(node, ast.Compare):
            self.change_operators([node.left, *node.comparators], place)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
            if not isinstance(node.operand, ast.Constant):  # else the number is changed
                start, _ = self.span(node)
                self.change_once((start, start + len(UNARY[type(node.op)])), "", place)
        elif isinstance(node, ast.Constant):
            self.change_number(node, place)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in FUNCTIONS:
                _, end = self.span(node.func)
                self.change_once((end - len(name), end), FUNCTIONS[name], place)

    def change_condition(self, node, place):
        test = self.span(node.test)
        if not isinstance(node, ast.While):  # which would never end
            self.add(test, "True", place)
        is_simple = isinstance(node, ast.If) and not node.orelse and len(node.body) == 1
        if not (is_simple and self.can_be_left_out(node.body[0])):
            self.add(test, "False", place)
        if isinstance(node.test, ast.UnaryOp):
            self.changed.add(test)  # a lost "not" is noticed if True or False is

    def change_arithmetic(self, node, place):
        has_sign = isinstance(node.left, ast.UnaryOp)
        if has_sign or isinstance(node.left, ast.Constant) or isinstance(node.right, ast.Constant):
            return  # the sign or the number is changed
        self.change_operators([node.left, node.right], place)
        is_sum = isinstance(node.op, (ast.Add, ast.Sub))
        if is_sum and isinstance(node.right, ast.BinOp) and isinstance(node.right.op, ast.Mult):
            self.changed.add(self.span(node.right))  # in a + b * c, the sign is enough

    def change_operators(self, terms, place):
        """Change the operator between each term and the next one."""
        for left, right in zip(terms[:-1], terms[1:], strict=True):
            _, start = self.span(left)
            end, _ = self.span(right)
            between = self.text[start:end].decode()
            blank = re.sub("#.*", lambda comment: " " * len(comment[0]), between)
            operator = blank.strip("() \n")
            if operator in OPERATORS:
                before = blank.index(operator)
                after = before + len(operator)
                new = between[:before] + OPERATORS[operator] + between[after:]
                self.change_once((start, end), new, place)

    def change_number(self, node, place):
        start, end = self.span(node)
        number = node.value
        if type(number) not in (int, float):
            return
        is_one = type(number) is int and number == 1 and not self.text[:start].endswith(b"-")
        if number == 0:
            new = 1
        elif is_one or number < TINY:
            new = 0
        elif type(number) is int:
            new = number + 1
        else:
            new = 2 * number
        self.change_once((start, end), str(new), place)

    def change_once(self, span, replacement, place):
        if place not in self.changed:
            self.changed.add(place)
            self.add(span, replacement, place)

    def add(self, span, replacement, place):
        """Keep the source with this replacement, if it is Python and something is new."""
        start, end = span
        new = replacement.encode()
        # The rest of the file keeps its line numbers: lines that would vanish are continued.
        lost_lines = self.text.count(b"\n", start, end) - new.count(b"\n")
        source = self.text[:start] + new + b"\\\n" * lost_lines + self.text[end:]
        try:
            ast.parse(source)
        except SyntaxError:
            return
        if source == self.text:
            return

        shown_start, shown_end = place or span
        before = self.text[shown_start:shown_end].decode()
        after = (self.text[shown_start:start] + new + self.text[end:shown_end]).decode()
        text = f"{' '.join(before.split())} -> {' '.join(after.split())}"
        change = text
        count = 1
        while f"{self.name}: {change}" in self.mutants:
            count += 1
            change = f"{text} ({count})"  # the same text stands in the function once more
        key = f"{self.name}: {change}"
        line = self.text.count(b"\n", 0, start) + 1
        name = f"{self.name}:+{line - self.first_line} (line {line}) {change}"
        self.mutants[key] = Mutant(name, key, source)


def find_mutants(source):
    """All mutants of the algorithm, in the order of the source."""
    lines = source.splitlines()
    end = next(number for number, line in enumerate(lines, start=1) if line.startswith(END))
    finder = Finder(source)
    for node in ast.parse(source).body:
        if node.lineno > end:
            break
        if isinstance(node, ast.FunctionDef):
            finder.search(node, node.name)
        if isinstance(node, ast.ClassDef) and node.name not in NO_ALGORITHM:
            for part in node.body:
                is_method = isinstance(part, ast.FunctionDef)
                finder.search(part, f"{node.name}.{part.name}" if is_method else node.name)
    return list(finder.mutants.values())


def tests_pass(source, selection, seconds, output=subprocess.DEVNULL):
    """Run tests on this ppo.py in a folder of its own. Tests that take too long do not pass."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for file in FILES:
            if (ROOT / file).is_dir():
                shutil.copytree(ROOT / file, Path(folder, file))
            else:
                shutil.copy(ROOT / file, folder)
        Path(folder, "ppo.py").write_bytes(source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["--hypothesis-seed=0", "--basetemp=temporary", "-k", selection, "test_ppo.py"]
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what the tests started
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="run only so many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument(
        "--only", default="", metavar="NAME", help="run those with this in the name"
    )
    parser.add_argument("--jobs", type=int, default=2, help="at the same time (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names, run nothing")
    options = parser.parse_args()

    source = (ROOT / "ppo.py").read_text(encoding="utf-8")
    all_mutants = find_mutants(source)
    mutants = [mutant for mutant in all_mutants if options.only in mutant.name]
    if options.sample is not None and options.sample < len(mutants):
        mutants.sort(key=lambda mutant: mutant.name)
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    if options.list:
        for mutant in mutants:
            print(mutant.name)
        return 0

    limits = {}  # seconds for each selection
    for selection in SELECTIONS:
        start = time.perf_counter()
        if not tests_pass(source.encode(), selection, None, sys.stderr):
            print("the tests fail on ppo.py itself", file=sys.stderr)
            return 1
        limits[selection] = max(60, 10 * (time.perf_counter() - start))

    def survives(mutant):
        return all(tests_pass(mutant.source, *limit) for limit in limits.items())

    start = time.perf_counter()
    survived = 0
    failed = False
    pool = ThreadPoolExecutor(options.jobs)
    try:
        runs = {pool.submit(survives, mutant): mutant for mutant in mutants}
        for done, run in enumerate(as_completed(runs), start=1):
            mutant = runs[run]
            if run.result():
                survived += 1
                failed = failed or mutant.key not in EXPLAINED
                reason = EXPLAINED.get(mutant.key, "NOT EXPLAINED")
                print(f"survived: {mutant.name}: {reason}", flush=True)
            if done % 10 == 0:
                seconds = time.perf_counter() - start
                print(f"{done} of {len(mutants)} after {seconds:.0f} s", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)

    if mutants == all_mutants:
        keys = {mutant.key for mutant in mutants}
        for key in EXPLAINED:
            if key not in keys:
                failed = True
                print(f"EXPLAINED, but there is no such mutant: {key}")
    print(f"{len(mutants)} mutants: {len(mutants) - survived} killed, {survived} survived")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
