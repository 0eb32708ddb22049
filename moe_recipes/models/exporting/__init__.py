"""From a distributed model to a folder that Transformers and serving engines load.

export.py     the export itself     plan.py       keys and files          convert.py    Transformers' reverse conversion
source.py     the source's dtypes   folder.py     small files, renaming   ranks.py      all ranks succeed, or all fail
verify.py     every byte read back  checksums.py  a CRC-32 a tensor       reload.py     loaded again, and by engines
record.py     EXPORT.json
"""
