"""Where training windows come from: the schedule, the replay buffer, and generation."""
