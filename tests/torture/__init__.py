"""Machinery that tries to break sharding: kills, full disks, hostile files, bit rot, rival runs, odd places.

`python -m tests.torture` tries everything in full and prints one table; `tests/test_torture.py` runs the same
trials in smaller numbers. A fault is one line that begins with the command that tries it again.
"""
