"""The parts of the table: each module has ``measurements(machine)``, which yields one measurement for each row."""
