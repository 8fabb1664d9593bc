import re

from conftest import ROOT


def test_example_runs(run_python):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert run_python(example).startswith("tensor([")
