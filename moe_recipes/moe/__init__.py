"""Mixture-of-experts mathematics for any model: dispatch, expert computation, and the slow reference beside them.

Shape letters, used as tensor suffixes here and in the loss:

    T  tokens on this rank          K  experts a token picks        N  routed rows: (token, expert) pairs
    D  hidden                       E  experts in the model         R  rows received from all ranks
    F  expert hidden                e  experts on this rank         S  rows sent to all ranks
    P  ranks of the expert-parallel group
"""
