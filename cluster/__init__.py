"""Where and when it runs: the nightly job, the gate, the command line.

Reading order: simulate, lock, morning, promotion, late, status, nightly, predict, export, doctor, tables, cli.
"""
