"""Work that serves no request: distilling a first drafter, replaying a recorded stream, inspecting a drafter."""
