"""The pack's HTTP routes; ComfyUI serves each under /api as well.

GET  /soda/training        {"trainings": [...]}, each as `live.LiveTraining.summary` gives it
POST /soda/training/stop   {"node": id, "prompt": id} ends that training after its step; 409 where it does not run
"""

from __future__ import annotations

from aiohttp import web
from server import PromptServer

from . import live


def register() -> None:
    server = getattr(PromptServer, "instance", None)
    if server is None:  # ComfyUI used as a library
        return
    server.routes.get("/soda/training")(_trainings)
    server.routes.post("/soda/training/stop")(_stop)


async def _trainings(_request: web.Request) -> web.Response:
    return web.json_response({"trainings": live.summaries()})


async def _stop(request: web.Request) -> web.Response:
    try:
        asked = await request.json()
        node, prompt = asked["node"], asked["prompt"]
    except (ValueError, TypeError, KeyError):
        return web.json_response({"error": 'Send JSON like {"node": "5", "prompt": "<prompt id>"}.'}, status=400)
    if not live.stop(node, prompt):
        return web.json_response({"error": f"Node {node} is not training in that run; it may be over."}, status=409)
    return web.json_response({})
