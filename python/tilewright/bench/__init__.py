"""Microbenchmarks beside the peers that are installed, all contenders of a case in one process, alternating.

    case.py         what is measured: a Case and its contenders
    optim.py        a family: PEERS, and cases(device, quick)
    timing.py       how: warm-up, alternation, medians; CUDA events and wall clock
    environment.py  on what: device, versions, commit
    runner.py       `tilewright bench`: the loop, the progress bar, the JSON
    report.py       the table and the plot
    compare.py      `tilewright bench compare A.json B.json`

A benchmark here is never a pass or fail test.
"""
