"""Microbenchmarks beside the peers that are installed, all contenders of a case in one process, alternating.

    case.py         what is measured: a Case and its contenders, for a Plan
    presets.py      sizes of known models
    optim.py        a family: PEERS, GPU_PEERS (those that need a GPU), and cases(plan)
    timing.py       how: warm-up, alternation, medians; CUDA events and wall clock
    environment.py  on what: device, versions, commit
    runner.py       `tilewright bench`: the loop, the progress bar, the files
    report.py       the table, and what it sums up to
    chart.py        the chart, for the PNG and the page
    page.py         the HTML page
    compare.py      `tilewright bench compare A.json B.json`

A benchmark here is never a pass or fail test.
"""
