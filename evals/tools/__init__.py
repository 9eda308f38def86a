"""What is measured beside answers: speed, memory, attention, kept tokens next to kvpress, servers under load."""
