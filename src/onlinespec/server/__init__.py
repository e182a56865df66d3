"""An OpenAI-compatible server: `engine.py` decodes in its own thread, `app.py` handles HTTP."""
