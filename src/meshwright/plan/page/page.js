"use strict";
// The page: each section from its part of the data.

heading();
headline();
timeSection();
warningsSection();
timelineSection();
pipelineSection();
memorySection();
meshSection();
communicationSection();
sourceSection();
machineSection();
