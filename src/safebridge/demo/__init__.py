"""The main job: measure the gap, close it, measure again, and show it."""
