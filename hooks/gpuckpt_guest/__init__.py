"""What runs inside a container of gpuckpt: :mod:`gpuckpt_guest.lifecycle` for any Python server, a plugin for vLLM."""
