"""Demonstrations on real data: `tilewright demo`.

text.py            the text: Python's own documentation, as bytes
language_model.py  the model: a small byte-level transformer in plain torch
optim.py           the demonstration: 8-bit AdamW beside torch's fused 32-bit AdamW
plot.py            its picture
"""
