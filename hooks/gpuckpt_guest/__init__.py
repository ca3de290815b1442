"""What runs inside a container of gpuckpt.

:mod:`gpuckpt_guest.lifecycle` is for any Python server, :mod:`gpuckpt_guest.vllm_plugin` for vLLM; both need the
standard library only. The rest is a server itself, the session engine: ``python -m gpuckpt_guest serve``, on torch and
transformers.
"""
