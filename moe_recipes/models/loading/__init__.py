"""From safetensors files into a distributed model.

load.py         the load itself     plan.py      which rows of which file     files.py       files, what may be wrong
stored.py       FP8 and MXFP4       whole.py     Transformers' own loader     mixed_rows.py  rows that change places
conversions.py  names on disk       warnings.py  what the drop-in warns of
"""
