"""Mixture-of-experts mathematics for any model: dispatch, expert computation, and the slow reference beside them.

Shape letters, used as tensor suffixes here and in the loss:

    T  tokens on this rank          K  experts a token picks        N  routed rows: (token, expert) pairs
    D  hidden                       E  experts in the model         R  rows received from all ranks
    F  expert hidden                e  experts on this rank         S  rows sent to all ranks
    P  ranks of the expert-parallel group
"""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_recipes.moe.experts import experts_forward

EXPERTS = "moe_recipes"
# Here, where any import of this room passes: a pickled model must find its expert computation in a new process.
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
