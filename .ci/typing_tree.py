"""Links the source folders to their import names under build/typing, where mypy can follow them."""

from pathlib import Path

root = Path(__file__).resolve().parent.parent
tree = root / "build" / "typing" / "sidestep"
tree.mkdir(parents=True, exist_ok=True)
for link in tree.iterdir():
    link.unlink()
for entry in (root / "python" / "sidestep").iterdir():
    (tree / entry.name).symlink_to(entry)
(tree / "kernels").symlink_to(root / "triton_kernels")
(tree / "runtime").symlink_to(root / "runtime")
