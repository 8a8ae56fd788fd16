"""What attention transfer costs, measured against the memory floor and against what others do.

`make bench`, `attention-transfer bench` and `python -m benchmarks` append rows to a CSV in `results/`, and
`tables` writes docs/speed.md from them. Nothing here asserts anything.
"""
