"""The scans as torch ops, a module each: schema, implementation, fake kernel, gradient."""
