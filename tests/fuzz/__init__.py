"""The hostile campaign: kinds of damaged or hostile input, what is right for each, and a runner that survives them.

`python -m tests.fuzz` runs all of it, `test_campaign.py` a small part. The tables of
kinds are in the files that registry.py names.
"""
