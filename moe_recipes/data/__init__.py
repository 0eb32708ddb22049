"""Rows -> chats -> tokens -> packed batches, each a pure function of its inputs.

rows.py          files, folders, globs, hf: -> rows with file and line
shapes.py        a row -> Chat, Completion or Text, or what is wrong with it
chat.py          Chat, Completion, Text -> token ids and loss mask
tokens.py        all rows of some files -> a token cache
cache.py         folders of arrays: written once by the main rank, memory-mapped by all
pieces.py        rows that are too long: split, truncated, skipped or refused
packing.py       pieces -> packed rows of seq_len tokens
prepare.py       all of the above in order: ``open_data``
loader.py        packed rows -> the batches of a step
stdlib_chats.py  the demo's data and tokenizer, from this machine's own Python
"""
