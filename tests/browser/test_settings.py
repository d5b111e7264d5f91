"""The pack's settings are in ComfyUI's settings and reach the file that the server reads."""

import json

SETTINGS = {"SODA.basesInMemory": 6, "SODA.basesOnDisk": 8}


def test_settings_have_their_defaults_and_are_kept(page, server):
    for name, default in SETTINGS.items():
        assert page.evaluate("(name) => app.extensionManager.setting.get(name)", name) == default
    with page.expect_response(lambda response: "/settings" in response.url and response.request.method == "POST"):
        page.evaluate("app.extensionManager.setting.set('SODA.basesInMemory', 2.5)")
    kept = json.loads((server.base / "user" / "default" / "comfy.settings.json").read_text())
    assert kept["SODA.basesInMemory"] == 2.5
    page.evaluate("app.extensionManager.setting.set('SODA.basesInMemory', 6)")
