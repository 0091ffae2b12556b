"""What the jobs of `lp-plugin run` and `lp-plugin generate` share: input texts, finished results on disk, ranks."""
