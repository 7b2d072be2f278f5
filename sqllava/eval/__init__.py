"""Evaluation: benchmark file -> prompts -> answers.jsonl -> score."""
