"""A tiny chapter, written and run by the real script, that the tests then break in every way."""

from pathlib import Path

import pytest

import notebooks

CHAPTER = """\
# %% [markdown]
# # A tiny chapter
#
# How fast does a sum of halves approach one? With $S_n = \\sum_{i=1}^{n} 2^{-i}$:

# %%
from lmtutorial.plots import curves, show

# %% [markdown]
# ## The sum

# %%
sums = [1 - 2.0**-n for n in range(1, 6)]
print(f"after {len(sums)} terms: {sums[-1]:.5f}")

# %%
figure = curves({"sum": sums}, x="terms", y="sum")
show(figure, alt="Line chart of the sum by the number of terms; it approaches one")

# %% tags=["nbval-ignore-output"]
import time

print(f"clock: {time.time():.6f}")

# %% [markdown]
# ## Summary
#
# It does.
#
# ## Where to read more
#
# Any book on series.
#
# ## Exercises
#
# ### Exercise 1: the limit

# %%
# Solution to exercise 1
assert abs(sums[-1] - 1) < 0.05

# %% [markdown]
# ### Exercise 2: the gap

# %%
# Solution to exercise 2: each gap is half of the one before
gaps = [1 - s for s in sums]
assert all(abs(b - a / 2) < 1e-12 for a, b in zip(gaps, gaps[1:]))

# %% [markdown]
# ### Exercise 3: the start

# %%
# Solution to exercise 3
assert sums[0] == 0.5
sums[0]
"""


@pytest.fixture(scope="session")
def chapter_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chapter")
    script = folder / "tiny.py"
    script.write_text(CHAPTER, encoding="utf-8")
    target = folder / "tiny.ipynb"
    assert notebooks.main(["from-py", str(script), str(target)]) == 0
    return target.read_text(encoding="utf-8")


@pytest.fixture
def chapter(chapter_text: str, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.ipynb"
    path.write_text(chapter_text, encoding="utf-8")
    return path
