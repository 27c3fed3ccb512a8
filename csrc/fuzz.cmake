# Fuzz targets of plan files and of sequences of calls, under AddressSanitizer (with leaks) and
# UndefinedBehaviorSanitizer: cmake -DSIDESTEP_FUZZ=ON. With clang they are libFuzzer's; with gcc a
# small driver mutates a corpus (csrc/fuzz/driver.cpp).
set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O1)
target_compile_options(sidestep_objects PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${sanitizers}>)
target_link_options(sidestep PRIVATE -fsanitize=address,undefined)
foreach(name plan engine)
  add_executable(${name}_fuzz csrc/fuzz/${name}_fuzz.cpp)
  target_link_libraries(${name}_fuzz PRIVATE sidestep)
  target_compile_definitions(${name}_fuzz PRIVATE
    SIDESTEP_FUZZ_ROOT="${CMAKE_CURRENT_SOURCE_DIR}/")
  target_compile_options(${name}_fuzz PRIVATE ${sanitizers} -Wall -Wextra)
  if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
    target_link_options(${name}_fuzz PRIVATE -fsanitize=fuzzer,address,undefined)
  else()
    target_sources(${name}_fuzz PRIVATE csrc/fuzz/driver.cpp)
    target_link_options(${name}_fuzz PRIVATE -fsanitize=address,undefined)
  endif()
endforeach()
add_custom_target(fuzz DEPENDS plan_fuzz engine_fuzz)
