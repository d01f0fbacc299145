"""The plumbing below the stage scripts."""
