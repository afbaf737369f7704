def adamw_(*args, **kwargs):
    raise RuntimeError("not written yet")


