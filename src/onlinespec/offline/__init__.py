"""Offline work, without serving: distilling a first drafter, replaying a recorded stream, inspecting a drafter."""
