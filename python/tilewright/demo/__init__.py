"""Demonstrations on real data: `tilewright demo`.

story.py           the whole: a model of Mamba and attention layers, swapped, trained, pruned, compressed
story_report.py    what it says at its end
optim.py           a family's demonstration: 8-bit AdamW beside torch's fused 32-bit AdamW
scan.py            another: a Mamba of transformers as it comes, and swapped
attention.py       another: a Llama of transformers with dense attention, and with a sliding window
estimators.py      what estimators keep of that attention
prune.py           another: a classifier and a Llama, pruned, repaired and compressed
prune_tasks.py     their models and data
text.py            the text: Python's own documentation, as bytes
language_model.py  the model of `optim`: a small byte-level transformer in plain torch
training.py        a model being trained, and what is seen on the way
host.py            what those with models of transformers share
show.py            how they talk: progress bars, tables, files
plot.py            their pictures

Each has `run(steps, seeds, out, quick) -> exit status`, and for the documents `print_table(record, console)`
and THEIRS and OURS, the names of what it compares.
"""
