"""Transformers' modules with kernels of this package in them, where their source is the one that the kernel computes.

norms.py      RMSNorm             attention.py  q/k norm and rope       residual.py   residual sum and norm
mlp.py        shared experts      mla.py        DeepSeek's attention    gpt_oss.py    GPT-OSS's attention
"""
