# A job of which one rank dies must end by itself, soon and with a failure.
# cmake "-DMPI_RUN=mpiexec;..." -DPROGRAM=... -DCASE=... -DRANKS=... -P killed.cmake
execute_process(COMMAND ${MPI_RUN} -n ${RANKS} ${PROGRAM} ${CASE}
                RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output TIMEOUT 15)
if(result MATCHES "timeout")
  message(FATAL_ERROR "the job still ran after 15 s:\n${output}")
elseif(result EQUAL 0 OR result EQUAL 3)
  message(FATAL_ERROR "the job ended with ${result}:\n${output}")
elseif(output MATCHES "no group|did not start|[Cc]ommand not found")
  message(FATAL_ERROR "the job did not come that far:\n${output}")
endif()
message("the job ended with ${result}\n1 passed, 0 failed")
