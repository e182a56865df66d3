"""An OpenAI-compatible server: `engine.py` decodes in a thread of its own, `app.py` speaks HTTP."""
