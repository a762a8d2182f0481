"""Drafts of plans for models that have none, from the record of one forward, and their proof."""
