"""Requests → tokens: which tokens each step computes, and what is chosen from its logits."""
