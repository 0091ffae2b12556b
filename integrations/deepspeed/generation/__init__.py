"""Generation on DeepSpeed's pipeline engine: `engine.generate(...)`."""
