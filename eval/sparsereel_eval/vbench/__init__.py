"""VBench (Huang et al., 2024): its score arithmetic, its file layout, and own versions of the dimensions that can be.

`scores` turns raw results of the official program into Quality, Semantic and Total. `layout` names a suite's clips.
`dimensions` measures clips itself; what it measures is named `vbench_like` and never enters an official total.
"""
