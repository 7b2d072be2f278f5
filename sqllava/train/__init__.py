"""Training: `python -m sqllava.train`, or `deepspeed --module sqllava.train`."""
