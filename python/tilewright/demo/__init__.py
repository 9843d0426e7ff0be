"""Demonstrations on real data: `tilewright demo`.

text.py            the text: Python's own documentation, as bytes
language_model.py  the model: a small byte-level transformer in plain torch
optim.py           a family's demonstration: 8-bit AdamW beside torch's fused 32-bit AdamW
scan.py            another: a Mamba of transformers as it comes, and swapped
attention.py       another: a Llama of transformers with dense attention, and with a sliding window
prune.py           another: a classifier and a Llama, pruned, repaired and compressed
prune_tasks.py     their models and data
host.py            what those with models of transformers share
plot.py            their pictures

A family's module has `run(steps, seeds, out, quick) -> exit status`, and for the documents
`print_table(record, console)` and THEIRS and OURS, the names of what it compares.
"""
